"""A model folder that is either absent or whole, and what lies in it beside the weights."""
