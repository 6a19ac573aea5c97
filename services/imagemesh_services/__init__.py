"""The five services of the mesh, one room each. They never import one another."""
