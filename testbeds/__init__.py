"""Device profiles and environments, as data, and the modes that run a plan on them."""
