"""The loop: play, judge, learn, again; and what else composes all the parts."""
