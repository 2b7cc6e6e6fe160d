"""Random command lines and random requests to the page: whatever comes, there is an answer that names what is wrong."""
