"""One run from its flags to its last step: folder, parts, records, signals."""
