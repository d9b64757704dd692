package hsmkeys

type Split struct {
	ID        string `json:"split"`
	Threshold int    `json:"threshold"`
	Count     int    `json:"count"`
}
