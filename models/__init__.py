"""Networks, one folder for each family."""
