"""What is known before anything is learned: targets, statistics and their files, names of sites, processes."""
