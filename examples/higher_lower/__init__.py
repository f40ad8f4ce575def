"""A world, a judge and a trainer of somebody else's."""
