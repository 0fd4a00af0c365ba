"""The secure sum: what hides an update inside the ring, calculation only."""
