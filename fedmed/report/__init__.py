"""One self-contained page about a run, or about several runs compared.

`fedmed.report.page.build_report` writes the page, `fedmed.report.tables` gives its
result table to the command line. Both only read what the run folder holds.
"""
