"""Level two: between devices. See README.md beside this file for both exchanges and their cost."""
