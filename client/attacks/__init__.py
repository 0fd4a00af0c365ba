"""Attacks on this site's own training, to see them fail; nothing here runs in a federation."""
