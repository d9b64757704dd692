package config

import "strings"

// Nearest is the candidate that a word was most likely meant to be: the one that it begins, or that the fewest letters
// left out, put in, changed or swapped make of it, if these are at most a third of them. It is empty if there is none.
func Nearest(word string, candidates []string) (nearest string) {
	for _, c := range candidates {
		if len(word) > 2 && strings.HasPrefix(c, word) {
			return c
		}
	}
	best := (len(word) + 2) / 3
	for _, c := range candidates {
		if d := distance(word, c); d <= best && d < len(c) && (nearest == "" || d < best) {
			nearest, best = c, d
		}
	}
	return nearest
}

// distance is the optimal string alignment distance.
func distance(a, b string) int {
	before, last, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			row[j] = min(last[j]+1, row[j-1]+1, last[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
		before, last, row = last, row, before
	}
	return last[len(b)]
}
