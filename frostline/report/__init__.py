"""Make reports: self-contained HTML pages, plots as inline SVG, and contact sheets."""
