"""Servers of tiny models for every test of this folder."""

from serve_setup import client, first, folder, server  # noqa: F401
