"""Everything a user can get wrong, found before anything is launched.

Each error names the argument, the rule, what was found and what to do. Each check takes
an argument as it was given and returns it as the call needs it, the leading axes still
apart.
"""
