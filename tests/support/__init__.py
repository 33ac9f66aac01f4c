"""Helpers that several tests share: tiny models, short runs, sample data, hostile inputs."""
