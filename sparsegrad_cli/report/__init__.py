"""Run records to terminal, Markdown and self-contained HTML. No torch; matplotlib only to plot."""
