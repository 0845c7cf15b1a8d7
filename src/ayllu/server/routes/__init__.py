"""The endpoints, a file for each family. They translate; what they ask for is done elsewhere."""
