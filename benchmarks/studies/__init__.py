"""Studies of speed and deployment, which no table has."""
