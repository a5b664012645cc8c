"""Does reweighting help on the demo task? DAPO beside three reweightings, over seeds."""
