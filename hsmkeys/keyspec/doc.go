// Package keyspec says what each key of this project is: its name, from which CKA_ID and label are derived, and the
// template that it is made with. It makes none.
package keyspec
