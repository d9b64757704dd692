// Package keyspec defines each key of this project: its name, from which CKA_ID and label are derived, and its
// template. It makes no keys.
package keyspec
