"""Reports as one page of HTML: sections, figures, templates."""
