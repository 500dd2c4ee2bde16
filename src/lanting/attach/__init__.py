"""What is hung on the networks from outside: weights that come and go, and results that were computed beforehand."""
