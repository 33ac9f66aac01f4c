"""Write the generated pages of docs/reference: ``python -m docs.generate``."""

from docs.generate.pages import PAGES

for path, page in PAGES.items():
    path.write_text(page(), encoding="utf-8")
