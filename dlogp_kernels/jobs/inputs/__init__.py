"""What a user hands in: lines of data, problems, conversations and models, checked and turned into token ids."""
