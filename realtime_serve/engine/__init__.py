"""Workers and what connects a front end to them."""
