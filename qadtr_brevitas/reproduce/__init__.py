"""The reproduction of one paper: its studies, analyses and tables, and the page that compares them with ours."""
