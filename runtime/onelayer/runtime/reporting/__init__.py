"""Results for people: tables, summaries, charts, the HTML report."""
