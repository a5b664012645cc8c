"""What lets a killed run go on: whose directory it is, what is finished in it, and in which parts it is computed."""
