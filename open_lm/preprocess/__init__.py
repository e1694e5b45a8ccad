"""From raw text to shards: tokenize, shuffle, write, balance."""
