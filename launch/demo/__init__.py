"""`ratoon demo`: the whole path of the data through Ratoon, in minutes and on any machine."""
