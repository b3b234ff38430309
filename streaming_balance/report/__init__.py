"""Pictures and tables of what a plan does."""
