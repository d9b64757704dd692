package kmev1

// MaxCalls is how many calls an EstablishKMEsRequest may have.
const MaxCalls = 16
