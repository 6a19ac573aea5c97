"""Jobs: generations that are kept on the disk from the moment they are accepted until their pictures expire."""
