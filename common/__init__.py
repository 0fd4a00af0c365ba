"""What the sites and the coordinator must agree on: calculation only, no sockets, no clock."""
