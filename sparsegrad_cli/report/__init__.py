"""Render records as terminal text, Markdown, LaTeX and self-contained HTML. Imports no torch."""
