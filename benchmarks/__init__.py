"""Measure the speed, memory and quality figures that the documentation states."""
