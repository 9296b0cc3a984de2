"""Calls in the shape of other tools' calls, one module for each tool."""
