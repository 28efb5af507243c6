"""Reports: self-contained HTML pages, plots in inline SVG and contact sheets."""
