"""An HTTP server for models: OpenAI's and EasyLM's routes, and a page to chat on.  `openlm serve --help`."""
