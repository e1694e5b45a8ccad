"""Operators worth writing by hand, one function each, each with a plain torch reference it is tested against."""
