"""Work that the command line starts, as library calls: data in, progress, output that can be resumed."""
