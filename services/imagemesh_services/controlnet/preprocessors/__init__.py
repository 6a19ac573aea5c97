"""Makes of pictures what ControlNets follow: edges, depth, poses."""
