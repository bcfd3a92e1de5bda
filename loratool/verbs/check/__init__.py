"""`check`: what a program makes of an adapter, in the order in which data flows.

- `check`: rules that hold an adapter against a program's row in `CONSUMERS`, each of which yields findings.
- `fix`: an adapter without what the findings complain of, as far as that can be mended, and what that cost.
"""
