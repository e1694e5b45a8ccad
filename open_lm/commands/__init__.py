"""The programs of `openlm`: one module for each of its subcommands."""
