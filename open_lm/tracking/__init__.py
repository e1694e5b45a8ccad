"""Where figures go: one file per sink."""
