"""Methods on stereo pairs with true disparity."""
