"""The gateway: one front door for the mesh. It knows no model library; it routes, follows and answers."""
