"""Flower's SuperLink and our own door in front of it; no other room here knows Flower's insides.

``launcher`` starts it, ``grid`` reaches the sites through it; ``service`` is the process that it
runs in, with ``listener`` at the public door.
"""
