"""The command line: parse, call one function, render. No torch at import."""
