"""What a knowledgeable friend would look at on a machine, and what to change: `lanting doctor`.

Every check is a function of facts that gives findings; facts are gathered in one place and given by hand in tests.
Nothing is changed, nobody on the network is asked, and torch is imported by a child process alone, where a GPU is.
"""
